"""A small proxy before engines that compute prompts and engines that decode them."""
