"""How fast is it? Times of a linear against its rivals and the memory's speed, and the choices measured from them."""
