"""Fill in the hidden words of film reviews, without their labels, on a CPU: what the encoders of sentiment start
from."""

task = "reviews"
objective = "mlm"
data = "imdb+sst2"
lowercase = True
vocab_size = 8192
max_seq_len = 128
batch_size = 64
epochs = 5.0
lr = 3e-3
eval_every = 400
