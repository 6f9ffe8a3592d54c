"""How fast is a layer of experts, from the router's logits to the output?"""
