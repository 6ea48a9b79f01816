"""Small models, benign and backdoored, built from seeds for evaluation: nothing in the scanner imports them."""
