"""One file per DVC stage: the params and artifacts it reads, run(), what it writes. No stage imports another."""
