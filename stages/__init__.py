"""One file per DVC stage: the params sections and artifacts it reads, run(), what it writes. No stage imports another."""
