"""The sentiment of IMDB's film reviews on a CPU, from the masked language model of encoder_mlm_cpu.py."""

task = "reviews"
out_dir = "out/reviews/imdb"
init_from = "out/reviews/mlm"
data = "imdb"
max_seq_len = 400
hide = 0.2
epochs = 3.0
lr = 5e-4
eval_every = 140
