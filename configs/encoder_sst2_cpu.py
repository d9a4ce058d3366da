"""The sentiment of single sentences, SST-2, on a CPU, from the masked language model of encoder_mlm_cpu.py."""

task = "reviews"
out_dir = "out/reviews/sst2"
init_from = "out/reviews/mlm"
data = "sst2"
epochs = 4.0
lr = 5e-4
