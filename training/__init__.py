"""Train language models: data and packing, parameter groups, a Trainer with atomic checkpoints, scripts and the demo.

data.py               text from files, folders and datasets; packing into rows
parameter_groups.py   which parameter decays, and at which learning rate
trainer.py            HyenaTrainer: parameter groups, atomic checkpoints, a stop at the first non-finite loss
recipe.py             train(model, rows, ...): one recipe for any causal language model
train_lm.py           python -m training.train_lm --help
demo.py               make demo
"""
