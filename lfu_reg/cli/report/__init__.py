"""`lfu-reg report`: a comparison as one page that can be mailed."""
