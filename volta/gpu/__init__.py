"""What a Volta would run, run and checked on whatever newer card is at hand; this much travels in a bundle."""
