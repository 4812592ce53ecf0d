"""Ask the base with one of the PEFT adapters beside this file, or none, as router.json chooses.

`python example.py PROMPT [BASE]`: BASE is the base's folder or its name on the hub, where it is not in the project.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(__file__).parent
router = json.loads((folder / "router.json").read_text())
prompt, base = [*sys.argv[1:], router["base"]][:2]
tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
if tokenizer.chat_template:
    chat = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
keys = {"add_special_tokens": not tokenizer.chat_template, "return_token_type_ids": False}
inputs = tokenizer(prompt, return_tensors="pt", **keys)

with torch.no_grad():
    states = model(**inputs, output_hidden_states=True).hidden_states  # the embeddings, then every layer's
mean = states[int(router["layer"].rpartition(".")[2]) + 1].float().mean(1)[0]
likely = (torch.tensor(router["weight"]) @ mean + torch.tensor(router["bias"])).softmax(-1)[:-1]  # the last is for none
if likely.max() >= router["threshold"]:
    model = PeftModel.from_pretrained(model, folder / "adapters" / router["choices"][likely.argmax()])

answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
