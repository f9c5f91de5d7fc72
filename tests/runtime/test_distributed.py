"""Training and evaluation under torchrun: results of a single process, files written once, clear errors.

Shapes: B batch, C channel, H/W pixels, E experts.
"""

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Advmoe, Edit
from test_harness import FGSM, NOISE, SQUARE, make_config, make_resnet, make_target
from test_harness import PGD as LONGER
from test_microbatches import PGD, TRADES, Exact, exact, joint_recipe, recipe_of
from test_resume_training import MIXED, RECIPE, make_model, make_split
from tiny import FACTS
from torch import Tensor
from torch.nn import functional

from advmoe import cli
from advmoe.attacks.fab import FabT
from advmoe.attacks.registry import AttackSettings
from advmoe.cli import application
from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.data.dataset import Dataset
from advmoe.evaluation import harness
from advmoe.evaluation.batch_store import FinishedBatch
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget, evaluate
from advmoe.evaluation.minimal_perturbation import minimal_epsilons
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.models.mixture import Mixing, MixtureOfExperts
from advmoe.runtime import distributed, machine
from advmoe.runtime.checkpoints import manager
from advmoe.training.baselines.tasks import AlternatingTask
from advmoe.training.batch_attacks import Adversary
from advmoe.training.job import TrainingJob, TrainingResult, TrainingTask
from advmoe.training.joint import MixtureTask
from advmoe.training.single import PlainTask, SingleConfig, TradesTask
from advmoe.training.trainer import Trainer, fit

BATCHES = [12, 11, 3]  # images of three steps: the second is not divisible, in the third some processes have no image


@dataclass(frozen=True)
class Ended:
    """Exit code, return value and output of one process."""

    code: int
    result: Any
    out: str
    err: str


RunProcesses = Callable[..., list[Ended]]


@pytest.fixture
def run_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunProcesses:
    """`run_processes(3, work, 1, 2)` calls `work(1, 2)` in three processes as torchrun starts them; results by rank."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # for the preloaded modules
    context = multiprocessing.get_context("forkserver")  # imports once for all processes
    context.set_forkserver_preload(
        ["test_distributed", "stages.pretrain", "stages.evaluate", "torch._dynamo", "torch._inductor.config"]
    )
    runs = iter(range(100))

    def run(world: int, work: Callable[..., Any], *arguments: Any) -> list[Ended]:
        folder = tmp_path / f"processes-{next(runs)}"
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        known = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {"TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"} | known
        environment |= {name: value for name, value in os.environ.items() if name.startswith(machine.PREFIX)}
        processes = [
            context.Process(target=_process_main, args=(rank, environment, folder, Path.cwd(), work, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()  # leaves no process behind
            process.join()
        return [_ended(folder, rank, process.exitcode) for rank, process in enumerate(processes)]

    return run


def _process_main(
    rank: int, environment: dict[str, object], folder: Path, working_dir: Path, work: Callable[..., Any], arguments: Any
) -> None:
    for name in [name for name in os.environ if name.startswith(machine.PREFIX)]:
        del os.environ[name]
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ADVMOE_DEVICE": "cpu", "ADVMOE_THREADS": "1"}
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY), stream)
    os.chdir(working_dir)
    torch.set_num_threads(1)
    result = work(*arguments)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))


def _ended(folder: Path, rank: int, code: int | None) -> Ended:
    result = folder / f"result-{rank}"
    assert code is not None
    texts = ((folder / f"{name}-{rank}").read_text() for name in ("out", "err"))
    return Ended(code, pickle.loads(result.read_bytes()) if result.exists() else None, *texts)  # noqa: S301


def results_of(ended: list[Ended]) -> list[Any]:
    assert [each.code for each in ended] == [0] * len(ended), [each.err for each in ended]
    return [each.result for each in ended]


Fresh = Callable[[], None]


@pytest.fixture
def fresh_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    """`fresh_state()` switches to an empty checkpoint folder."""
    folders = (tmp_path / f"state-{number}" for number in range(100))

    def fresh() -> None:
        monkeypatch.setenv("ADVMOE_STATE_DIR", str(next(folders)))
        machine.machine.cache_clear()

    return fresh


# ---- gradients


class ExactGate(Exact):
    """Log weights of two experts."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return functional.log_softmax(super().forward(images_BCHW)[:, :2], dim=1)


def exact_mixture(mixing: Mixing) -> MixtureOfExperts:
    gate = ExactGate(norm=True)
    gate.load_state_dict(exact(norm=True).state_dict())
    return MixtureOfExperts([exact(norm=True), exact(norm=False)], gate, mixing)


def make_task(kind: str, most: int | None) -> tuple[TrainingTask, Any, Adversary]:
    if kind == "mixture":
        return MixtureTask(exact_mixture("probabilities"), joint_recipe(most)), joint_recipe(most), MIXED
    if kind == "in turn":
        return AlternatingTask(exact_mixture("top1"), joint_recipe(most)), joint_recipe(most), PGD
    model, recipe = exact(norm=True), recipe_of(most)
    if kind == "trades":
        return TradesTask(model, recipe, 2.0), recipe, TRADES
    if kind == "perturbed weights":
        recipe = recipe.model_copy(update={"awp": 0.1})
    return PlainTask(model, recipe), recipe, PGD


KINDS = ("plain", "trades", "perturbed weights", "mixture", "in turn")
Steps = dict[str, list[dict[str, Tensor]]]


def steps_of(kind: str, most: int | None) -> list[dict[str, Tensor]]:
    """Returns after each of three steps: gradients, weights and statistics, the loss, and the counted passes."""
    task, recipe, adversary = make_task(kind, most)
    split = make_split(sum(BATCHES), "steps")
    run = Trainer(
        task, TrainingJob("tiny", 0, Dataset({"train": split}, FACTS, "0" * 64), recipe, adversary, 0.05, "clean")
    )
    steps = []
    for images, labels in zip(torch.split(split.pixels(), BATCHES), torch.split(split.labels, BATCHES), strict=True):
        loss = run.step(images, labels)
        gradients = {name: each.grad for name, each in task.model.named_parameters() if each.grad is not None}
        state = {f"after {name}": each for name, each in task.model.state_dict().items() if each.is_floating_point()}
        counted = torch.tensor([run.state.passes.forward, run.state.passes.backward, run.state.images_learned])
        seen = {**gradients, **state, "loss": loss, "counted": counted}
        steps.append({name: tensor.clone() for name, tensor in seen.items()})
    return steps


def all_steps(mosts: tuple[int | None, ...]) -> list[Steps]:
    with distributed.process_group():
        return [{kind: steps_of(kind, most) for kind in KINDS} for most in mosts]


@pytest.mark.parametrize(("world", "whole"), [(2, 6), (3, 4)])
def test_gradients_equal_those_of_one_process_with_the_same_microbatches(
    world: int, whole: int, run_processes: RunProcesses
) -> None:
    """One process takes the microbatches in sequence, several processes share them: random numbers, losses, gradients,
    weights and running statistics agree in double precision.
    """
    by_rank = results_of(run_processes(world, all_steps, (None, 2)))
    for number, most in enumerate((whole, 2)):
        for kind in KINDS:
            for step, expected in enumerate(steps_of(kind, most)):
                for actual in (rank[number][kind][step] for rank in by_rank):
                    assert actual.keys() == expected.keys()
                    for name, tensor in actual.items():
                        torch.testing.assert_close(tensor, expected[name], atol=1e-9, rtol=0, msg=f"{kind}: {name}")


# ---- whole trainings


class Recording(PlainTask):
    """Records the sums of the pixels of all training images."""

    seen: list[float]

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled() and hasattr(self, "seen"):
            self.seen += images_BCHW.double().sum(dim=(1, 2, 3)).tolist()
        return super().loss(images_BCHW, labels_B, clean_BCHW)


def data_of(count: int) -> Dataset:
    return Dataset({"train": make_split(count, "train"), "validation": make_split(9, "validation")}, FACTS, "0" * 64)


def trained(count: int, adversary: Adversary, **changes: Any) -> TrainingResult:
    recipe = SingleConfig(validation_epsilon=0.05, **RECIPE | changes)
    job = TrainingJob("tiny", 0, data_of(count), recipe, adversary, 0.05, "clean")
    return fit(PlainTask(make_model(0), recipe), job)


def images_seen(count: int, batch_size: int) -> list[float]:
    with distributed.process_group():
        recipe = recipe_of(None).model_copy(update={"epochs": 1, "batch_size": batch_size})
        job = TrainingJob("tiny", 0, data_of(count), recipe, MIXED.of[0], 0.05, "clean")
        task = Recording(make_model(0), recipe)
        run = Trainer(task, job)
        task.seen = []
        run.epoch(lambda: None)
        return task.seen


@pytest.mark.parametrize(("count", "batch_size"), [(25, 8), (7, 2)])
def test_every_image_is_used_exactly_once_per_epoch(count: int, batch_size: int, run_processes: RunProcesses) -> None:
    by_rank = results_of(run_processes(3, images_seen, count, batch_size))
    expected = sorted(images_seen(count, batch_size))
    assert len(expected) == count
    assert sorted(image for seen in by_rank for image in seen) == pytest.approx(expected, abs=1e-9)


class Diverging(PlainTask):
    """Its loss is NaN from the fifth step on, in the second epoch."""

    steps = 0

    def on_step_start(self) -> None:
        super().on_step_start()
        self.steps += 1

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        loss = super().loss(images_BCHW, labels_B, clean_BCHW)
        return loss * torch.nan if self.steps > 4 else loss


def train_diverging(checkpoint_dir: Path) -> str:
    with distributed.process_group():
        recipe = recipe_of(None).model_copy(update={"epochs": 2, "batch_size": 8})
        job = TrainingJob("tiny", 0, data_of(32), recipe, MIXED.of[0], 0.05, "clean", checkpoint_dir=checkpoint_dir)
        with pytest.raises(UserError) as raised:
            fit(Diverging(make_model(0), recipe), job)
        return str(raised.value)


@pytest.mark.parametrize("seconds", ["0", "1000"])  # noticed when a checkpoint is saved, or at the end of the epoch
def test_divergence_raises_the_same_error_in_all_processes(
    seconds: str, run_processes: RunProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", seconds)
    first, second = results_of(run_processes(2, train_diverging, tmp_path))
    assert first == second
    assert (
        "NaN or infinite in epoch 2, batch 1; lower optimizer.lr or set clip; the last good weights, of epoch 1"
        in first
    )
    assert Path(first.rpartition(" ")[2]).is_file()


def trained_in_group(*arguments: Any) -> dict[str, Any]:
    with distributed.process_group():
        found = trained(*arguments, augmentation=RECIPE["augmentation"])
    return {"model": found.model.state_dict(), "history": found.history, "kept": found.kept, "cost": found.cost}


def test_a_training_gives_the_same_on_all_ranks_and_as_one_process(run_processes: RunProcesses) -> None:
    first, second = results_of(run_processes(2, trained_in_group, 24, MIXED.of[0]))
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    assert (first["history"], first["kept"], first["cost"]) == (second["history"], second["kept"], second["cost"])
    alone = trained(24, MIXED.of[0], micro_batch=4)
    assert first["cost"] == alone.cost
    for name, tensor in alone.model.state_dict().items():
        if tensor.is_floating_point():  # counters count microbatches
            torch.testing.assert_close(first["model"][name], tensor, atol=1e-4, rtol=1e-3)
    assert [row["loss"] for row in first["history"]] == pytest.approx([row["loss"] for row in alone.history], abs=1e-4)


# ---- only rank 0 prints and writes; a lost run is resumed


def command(arguments: tuple[str, ...], end: tuple[int, int, signal.Signals] | None = None) -> None:
    """Runs a command line. `end`: rank, step and signal that ends the process. Only rank 0 may write files."""
    rank = int(os.environ["RANK"])
    manager.MAX_TIME_SHARE = float("inf")
    if rank:
        for module in ("core.files", "core.artifacts", "runtime.checkpoints.storage"):
            vars(sys.modules[f"advmoe.{module}"])["write_bytes"] = forbid_writing
    if end is not None and rank == end[0]:
        vars(sys.modules["advmoe.training.trainer"])["Trainer"] = trainer_ending_at(*end[1:])
    sys.argv = ["advmoe", *arguments]
    cli.main()


def forbid_writing(path: Path, content: bytes) -> None:
    raise AssertionError(f"{len(content)} bytes for {path}")


def trainer_ending_at(step_number: int, by: signal.Signals) -> type[Trainer]:
    class Ending(Trainer):
        steps_taken = 0

        def step(self, images: Tensor, labels: Tensor) -> Tensor:
            self.steps_taken += 1
            if self.steps_taken == step_number:
                os.kill(os.getpid(), by)
            return super().step(images, labels)

    return Ending


def test_a_lost_process_ends_all_and_any_number_of_processes_resumes(
    run_processes: RunProcesses, project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "0")
    edit({"pretrain.epochs": 2, "pretrain.ema": 0.5})
    pretrain, files = ("pretrain", "clean"), paths.artifact("pretrain", "clean")
    first, second = run_processes(2, command, pretrain, (1, 3, signal.SIGTERM))
    assert (first.code, second.code) == (143, 143)
    assert first.out.endswith("clean: checkpoint saved; run the same command again to resume\n")
    assert first.err == "interrupted; run the same command again to resume\n"
    assert second.out + second.err == ""

    first, second = run_processes(2, command, pretrain, (1, 4, signal.SIGKILL))
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    assert first.out == "clean: resumed from a checkpoint, after 0 epochs and 3 steps\n"
    assert first.err.startswith("error: another process of this run was lost (")
    assert first.err.endswith("); run the same command again to resume, with any number of processes\n")
    assert first.err.count("\n") == 1
    assert not (project / files).exists()

    ended = run_processes(3, command, pretrain)
    assert [each.code for each in ended] == [0, 0, 0], [each.err for each in ended]
    resumed, *_, written = ended[0].out.splitlines()
    assert resumed == "clean: resumed from a checkpoint, after 0 epochs and 6 steps"
    assert written.startswith(f"written to {files}")
    assert [each.out + each.err for each in ended[1:]] == ["", ""]
    assert (project / files).exists()
    assert list(machine.machine().state_dir.iterdir()) == []


@pytest.mark.usefixtures("project")
def test_when_rank0_is_lost_another_rank_reports_it(run_processes: RunProcesses) -> None:
    first, second = run_processes(2, command, ("pretrain", "clean"), (0, 1, signal.SIGKILL))
    assert (first.code, second.code) == (-signal.SIGKILL, 2)
    assert second.err.startswith("rank 1: error: another process of this run was lost (")
    assert second.err.count("\n") == 1


# ---- evaluation


ATTACKS: dict[str, AttackSettings] = {"fgsm": FGSM, "pgd": LONGER, "square": SQUARE, "noise": NOISE}


def measured(batch_size: int | None, *, lost: bool = False) -> tuple[EvaluationResult, Tensor, list[int]]:
    """Returns the result, the minimal epsilons, and the images that this process attacked, over all attacks."""
    attacked: list[int] = []
    original = harness._attack_batch

    def batch(
        target: EvaluationTarget, name: str, attack: AttackSettings, config: EvaluationConfig, rows: Tensor
    ) -> FinishedBatch:
        if lost and distributed.rank() == 1 and attacked:
            os.kill(os.getpid(), signal.SIGKILL)
        attacked.extend(rows.tolist())
        return original(target, name, attack, config, rows)

    fitting = vars(harness)["estimate_batch_size"]
    vars(harness).update(
        _attack_batch=batch, estimate_batch_size=lambda *_: 3 + distributed.rank()
    )  # one GPU has more memory
    try:
        with distributed.process_group():
            target = make_target(make_resnet())
            config = make_config(batch_size=batch_size, limits={"square": 5})
            result = evaluate(target, ATTACKS, config)
            smallest = minimal_epsilons(target, FabT(kind="fab-t", steps=2, targets=1, restarts=1), result, config)
    finally:
        vars(harness).update(_attack_batch=original, estimate_batch_size=fitting)
    return result, smallest, attacked


def same_decisions(left: tuple[EvaluationResult, Tensor, Any], right: tuple[EvaluationResult, Tensor, Any]) -> bool:
    pairs = zip(left[0].correct.items(), right[0].correct.items(), strict=True)
    assert left[1].isfinite().any()
    return torch.allclose(left[1], right[1], atol=1e-5) and all(
        mine[0] == other[0] and torch.equal(mine[1], other[1]) for mine, other in pairs
    )


@pytest.mark.parametrize(("world", "batch_size"), [(2, 3), (3, None)])
def test_processes_share_the_images_and_decide_as_one_process(
    world: int, batch_size: int | None, run_processes: RunProcesses, fresh_state: Fresh
) -> None:
    fresh_state()
    by_rank = results_of(run_processes(world, measured, batch_size))
    fresh_state()
    alone = measured(batch_size)
    assert all(same_decisions(each, alone) for each in by_rank)
    shares = [each[2] for each in by_rank]
    assert sorted(row for share in shares for row in share) == sorted(alone[2])
    assert max(map(len, shares)) < len(alone[2]) * 0.7
    for name, outcome in alone[0].outcomes.items():
        assert all(each[0].outcomes[name].forward == outcome.forward for each in by_rank)


def lost_evaluation() -> None:
    sys.argv = ["advmoe", "info"]
    vars(application)["app"] = lambda: measured(2, lost=True)
    cli.main()


def test_a_lost_evaluation_is_resumed_by_any_number_of_processes(
    run_processes: RunProcesses, fresh_state: Fresh
) -> None:
    fresh_state()
    alone = measured(2)
    fresh_state()
    first, second = run_processes(2, lost_evaluation)
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    assert first.err.startswith("error: another process of this run was lost (")
    by_rank = results_of(run_processes(3, measured, 2))
    assert all(same_decisions(each, alone) for each in by_rank)
    done = 4  # two batches of two, one by each process
    assert sum(len(each[2]) for each in by_rank) == len(alone[2]) - done


def test_the_stage_writes_what_one_process_writes(
    run_processes: RunProcesses, project: Path, edit: Edit, advmoe: Advmoe
) -> None:
    claims = {"better": {"model": "mixture", "over": "baseline/standard", "under": "worst"}}
    edit({"evaluate.baselines": ["standard"], "evaluate.batch_size": 6, "evaluate.grid.epsilons": [0.1]})
    edit({"report.claims": claims})
    data = dataset.load(paths.DATASET)
    plain = PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="resnet18", width=2))
    for stage, name in (("pretrain", "clean"), ("pretrain", "pgd-1"), ("baseline", "standard")):
        model = classifiers.build(plain, data.facts, 0, name).eval()
        about: dict[str, Any] = {"params": {}, "inputs": {"dataset": data.sha256}, "seed": 0, "metrics": {}}
        classifiers.save(paths.artifact(stage, name), model, plain, data.facts, **about, seconds=0.0)

    def written() -> dict[Path, bytes]:
        files = [path for room in ("metrics", "plots", "artifacts/evaluate") for path in (project / room).rglob("*.*")]
        return {path: path.read_bytes() for path in files if path not in before and ".run." not in path.name}

    before: dict[Path, bytes] = {}
    before = written()
    assert advmoe("evaluate", "--record").code == 0
    alone = written()
    assert len(alone) > 20
    for path in alone:
        path.unlink()
    ended = run_processes(2, command, ("evaluate", "--record"))
    assert [each.code for each in ended] == [0, 0], [each.err for each in ended]
    assert written() == alone
    assert ended[1].out + ended[1].err == ""
    assert list(machine.machine().state_dir.iterdir()) == []


# ---- collective operations


def use_collectives() -> dict[str, Any]:
    with distributed.process_group():
        rank = distributed.rank()
        distributed.BUCKET_SIZE = 5
        tensors = [torch.full((2, 2), rank + 1.0), torch.arange(3.0) * rank, torch.ones(7), torch.ones(1)]
        distributed.all_reduce_sum_(tensors)
        sync = recipe_of(None).model_copy(update={"sync_batchnorm": True})
        job = TrainingJob("tiny", 0, data_of(8), sync, MIXED.of[0], 0.05, "clean")
        return {
            "sums": [tensor.tolist() for tensor in tensors],
            "max": distributed.all_reduce_max(rank),
            "shard": list(distributed.shard("abcde")),
            "gathered": distributed.all_gather(rank),
            "rank0": distributed.run_on_rank0(os.getpid) == distributed.all_gather(os.getpid())[0],
            "error": user_error(lambda: distributed.run_on_rank0(fail)),
            "same": user_error(lambda: distributed.require_same("tiny", "same")),
            "different": user_error(lambda: distributed.require_same("tiny", f"{rank}")),
            "sync": user_error(lambda: Trainer(PlainTask(make_model(0), sync), job)),
            "threads": torch.get_num_threads(),
        }


def fail() -> None:
    raise UserError(f"no such luck on {distributed.rank()}")


def user_error(work: Callable[[], object]) -> str | None:
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def test_collective_operations(run_processes: RunProcesses) -> None:
    first, second = results_of(run_processes(2, use_collectives))
    assert first["shard"] + second["shard"] == ["a", "c", "e", "b", "d"]
    assert first | {"shard": []} == second | {"shard": []}
    assert first["sums"] == [[[3.0, 3.0], [3.0, 3.0]], [0.0, 1.0, 2.0], [2.0] * 7, [2.0]]
    assert (first["max"], first["gathered"], first["rank0"]) == (1, [0, 1], True)
    assert (first["error"], first["same"]) == ("no such luck on 0", None)
    assert (
        first["different"]
        == "tiny: the processes do not start from the same params, data, networks, code and kind of device"
    )
    assert first["sync"] == ("tiny: sync_batchnorm: PyTorch synchronises BatchNorm between GPUs only; set it to false")


def test_without_a_process_group_values_are_unchanged() -> None:
    numbers = torch.ones(3)
    with distributed.process_group():
        distributed.all_reduce_sum_([numbers])
        assert (distributed.rank(), distributed.world_size(), distributed.is_rank0()) == (0, 1, True)
    assert numbers.tolist() == [1.0, 1.0, 1.0]
    assert distributed.all_reduce_sum(numbers) is numbers
    assert (distributed.all_reduce_max(3), distributed.all_gather(3), distributed.shard([1, 2])) == (3, [3], [1, 2])
    with pytest.raises(UserError, match=r"^no such luck on 0$"):
        distributed.run_on_rank0(fail)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_commands_for_one_process_run_on_rank0(rank: str, advmoe: Advmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    ran = advmoe("info")
    assert (ran.code, bool(ran.out)) == (0, rank == "0")


# ---- through DVC


def test_dvc_starts_several_processes(project: Path, edit: Edit) -> None:
    """`launcher` of params.yaml, run by DVC with torchrun in a separate project."""
    for name in ("advmoe", "stages"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    edit({"launcher": "torchrun --standalone --nproc-per-node=2"})
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "ADVMOE_DEVICE": "cpu",
        "ADVMOE_THREADS": "1",
    }
    repro = (["repro", "code", "inputs"], ["repro", "--single-item", "pretrain@clean"])
    for arguments in (["init", "--no-scm", "--quiet"], *repro):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "> torchrun --standalone --nproc-per-node=2 -m advmoe pretrain clean" in done.stdout
    assert done.stdout.count(f"written to {paths.artifact('pretrain', 'clean')}") == 1
    assert paths.artifact("pretrain", "clean").exists()
