"""Time and memory beside TRL's plain SFT and dense TA-SFT."""
