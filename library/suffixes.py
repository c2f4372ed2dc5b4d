"""How the names of weights files end."""

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")  # PyTorch's own
WEIGHTS_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
