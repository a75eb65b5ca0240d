"""The tier in Mooncake Store: its client, the memory it moves bytes from and to, and its verbs."""
