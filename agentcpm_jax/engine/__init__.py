"""Decoding in this process, and its server in SGLang's protocol."""
