"""Selected caches: of a context the tokens that matter, of each layer and head its own.

An answer from one is not the exact one, so nothing here happens unless a request asks for it.
"""
