"""LoRA adapters as the PEFT library stores them: folders read, checked, and written whole or not at all."""
