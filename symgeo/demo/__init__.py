"""Two dozen tiny vision transformers, trained on this machine in about a minute, to measure sharpness on."""
