"""An OpenAI-compatible server whose answers read memory; needs the extra ``server``."""
