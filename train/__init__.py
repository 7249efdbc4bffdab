"""train: makes the weights: triplets, LoRA/QLoRA fine-tuning, merged and GGUF exports.

python -m train
"""
