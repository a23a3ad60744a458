"""Run as a script where only transformers and what it needs is installed: loads a converted model and uses it.

    python -P alone.py MODEL PROBE OUTPUT [import this module first]

PROBE is a checkpoint's probe.safetensors. Writes OUTPUT.safetensors (logits and codes on the probe's tokens, in each
dtype) and OUTPUT.json.
"""

import importlib
import importlib.util
import json
import sys

import torch
from safetensors.torch import load_file, save_file

model_folder, probe_file, output, *preloaded = sys.argv[1:]
if preloaded:
    for name in preloaded:
        importlib.import_module(name)
else:
    for name in ("mf_train", "deepspeed", "megatron", "datasets", "pytest"):
        assert importlib.util.find_spec(name) is None, name

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402 - after the modules that were asked for

TEXTS = ["The state of the union", " two  spaces\n\n\ttab <|endoftext|> \u2581 \U0001f680", ""]
PROMPTS = ["The union", "States", "Message 7. the order of its affairs"]
NEW = 12

tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=True)
distrusting = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
tokens = load_file(probe_file)["tokens"][None]
tensors = {}
for dtype in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True, dtype=dtype)
    assert str(model.dtype) == f"torch.{dtype}"
    for name, module in model.model.named_modules():
        if type(module).__name__ == "Hash":

            def keep(module, inputs, outputs, key=f"{dtype}.codes.{name}"):  # type: ignore[no-untyped-def]
                tensors[key] = outputs[0][0].clone()

            module.register_forward_hook(keep)
    with torch.no_grad():
        tensors[f"{dtype}.logits"] = model(tokens).logits[0].float()
save_file(tensors, f"{output}.safetensors")

model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True, dtype="float32")


def generate(prompt: str, **options: object) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def sample(**options: object) -> list[int]:
    torch.manual_seed(0)
    return generate(PROMPTS[0], do_sample=True, temperature=0.7, **options)


batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
padded = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
labels = tokens.clone()
labels[:, :3] = -100
with torch.no_grad():
    with_labels = model(tokens, labels=labels)
report = {
    "dtype": str(AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True).dtype),
    "auto_dtype": str(
        AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True, dtype="auto").dtype
    ),
    "parameters": model.num_parameters(),
    "code": type(model).__module__.split(".")[0],
    "operators": sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mf_train")
    ),
    "texts": TEXTS,
    "prompts": PROMPTS,
    "new": NEW,
    "ids": [tokenizer(text, split_special_tokens=True)["input_ids"] for text in TEXTS],
    "same_ids_without_trust": [tokenizer(t)["input_ids"] for t in TEXTS]
    == [distrusting(t)["input_ids"] for t in TEXTS],
    "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS],
    "end_of_text": tokenizer("end" + tokenizer.eos_token)["input_ids"][-1],
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "greedy": [generate(prompt, do_sample=False) for prompt in PROMPTS],
    "greedy_without_cache": [generate(prompt, do_sample=False, use_cache=False) for prompt in PROMPTS],
    "padded": padded[:, batch["input_ids"].shape[1] :].tolist(),
    "padding": (batch["attention_mask"] == 0).sum(1).tolist(),
    "sampled": [sample(), sample(use_cache=False)],
    "beams": [generate(PROMPTS[0], num_beams=3), generate(PROMPTS[0], num_beams=3, use_cache=False)],
    "loss": with_labels.loss.item(),
    "expected_loss": torch.nn.functional.cross_entropy(with_labels.logits[0, :-1], labels[0, 1:]).item(),
    "tuple": [tuple(part.shape) for part in model(tokens, use_cache=False, return_dict=False)],
}
with open(f"{output}.json", "w") as file:
    json.dump(report, file)
