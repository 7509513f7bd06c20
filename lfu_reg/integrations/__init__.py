"""LfU in the training loops that are somebody else's code, and what it did there.

    from lfu_reg.integrations.hf import LfUTrainer             # transformers, pip install 'lfu_reg[hf]'
    from lfu_reg.integrations.trl import LfUSFTTrainer         # TRL, pip install 'lfu_reg[trl]'
    from lfu_reg.integrations.lightning import LfUCallback     # Lightning 2, pip install 'lfu_reg[lightning]'
    from lfu_reg.integrations.history import History           # a picture of a run, pip install 'lfu_reg[plot]'

A loop of one's own, with Accelerate or without, needs none of them: `loss = reg(model, batch, sft_loss_fn)`.
"""
