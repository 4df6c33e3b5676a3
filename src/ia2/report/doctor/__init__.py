"""What is wrong with a run, by rules over the facts in its folder."""
