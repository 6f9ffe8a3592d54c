"""What does vLLM take for the same model and the same requests?"""
