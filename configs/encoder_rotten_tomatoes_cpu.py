"""The sentiment of Rotten Tomatoes' sentences on a CPU, from the masked language model of encoder_mlm_cpu.py."""

task = "reviews"
out_dir = "out/reviews/rotten_tomatoes"
init_from = "out/reviews/mlm"
data = "rotten_tomatoes"
epochs = 4.0
lr = 5e-4
