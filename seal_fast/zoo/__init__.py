"""Build small benign and backdoored models from seeds, for evaluation only: nothing in the scanner imports them."""
