"""`lfu-reg compare`: whether LfU adds anything on one's own model and data beyond what SFT's learning rate can do."""
