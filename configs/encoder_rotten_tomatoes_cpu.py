"""The sentiment of Rotten Tomatoes' sentences on a CPU, from scratch: two thirds of its test sentences are in SST-2's
training split, which the masked language model of encoder_mlm_cpu.py has read."""

task = "reviews"
out_dir = "out/reviews/rotten_tomatoes"
data = "rotten_tomatoes"
lowercase = True
vocab_size = 8192
hide = 0.3
epochs = 8.0
