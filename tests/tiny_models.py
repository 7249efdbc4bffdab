"""Models of the Gemma and of the Mistral architecture that load in moments: random weights, a tokenizer made here.

What they answer makes no sense; the rest (chat templates, special tokens, LoRA) is as of the real ones.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TEXTS = Path(__file__).resolve().parents[1] / "examples" / "test.csv"

Kind = Literal["gemma", "mistral"]

# As the real ones have it: Gemma refuses a system role, Mistral knows none.
_CHAT = {
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
_TOKENS = {
    "gemma": {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"},
    "mistral": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
}


def tiny_model(folder: Path, kind: Kind, seed: int = 0) -> Path:
    """A transformers folder of two narrow layers; a megabyte. They are as wide as bitsandbytes wants: 64."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM

    tokenizer = make_tokenizer(kind)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: Any = (
        GemmaForCausalLM(GemmaConfig(**sizes))
        if kind == "gemma"
        else MistralForCausalLM(MistralConfig(**sizes, sliding_window=4096))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(folder: Path, base: Path, seed: int) -> Path:
    """A PEFT adapter for a base, whose answers it changes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    for name, weights in model.named_parameters():
        if "lora_B" in name:  # zeros at first, which change nothing
            torch.nn.init.normal_(weights, std=0.5)
    model.save_pretrained(str(folder))
    return folder


def bytewise(tokens: Sequence[str], template: str) -> Any:
    """A tokenizer of one token a byte: these, by their numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template)


def make_tokenizer(kind: Kind) -> Any:
    """A tokenizer of 600 tokens, trained on the texts of examples/test.csv."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = _TOKENS[kind]
    specials = [*tokens.values(), *(["<start_of_turn>", "<end_of_turn>"] if kind == "gemma" else [])]
    made = Tokenizer(models.BPE(unk_token=tokens["unk"]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    with _TEXTS.open(newline="", encoding="utf-8") as file:
        texts = [cell for row in list(csv.reader(file))[1:] for cell in row[1:]]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    bos = tokens["bos"]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    named = {f"{name}_token": token for name, token in tokens.items()}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=_CHAT[kind], **named)


def cut_gguf(source: Path, target: Path, layers: int) -> None:
    """Write the first layers of a GGUF model, as they are encoded, with its tokenizer."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        part = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=part)
    for tensor in reader.tensors:
        place = tensor.name.split(".")
        if place[0] != "blk" or int(place[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora_gguf(path: Path, tensors: Mapping[str, NDArray[np.float32]], alpha: float) -> Path:
    """Write a GGUF LoRA file for a llama; tensors are named as the model's, with .lora_a and .lora_b behind."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, content in tensors.items():
        writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
