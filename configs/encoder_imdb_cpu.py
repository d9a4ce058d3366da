"""The sentiment of IMDB's film reviews on a CPU, from scratch: one block over a large vocabulary of small letters."""

task = "reviews"
out_dir = "out/reviews/imdb"
data = "imdb"
lowercase = True
vocab_size = 20000
n_layers = 1
max_seq_len = 512
hide = 0.5
epochs = 3.0
optimizer = "adamw"
lr = 1e-3
eval_every = 94
