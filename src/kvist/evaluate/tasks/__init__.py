"""One file per task: it registers itself with its options, statistics, words and figures."""
