"""KVStrata under vLLM: name this module in ``kv_connector_module_path``."""

from kvstrata.connectors.vllm.connector import KVStrataConnector

__all__ = ["KVStrataConnector"]
