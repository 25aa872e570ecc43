"""Every setting and flag of the scripts, and the recipes that fill them."""
