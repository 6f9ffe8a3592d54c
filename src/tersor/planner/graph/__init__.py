"""What does a torch module compute, along which named dimensions can each operator be cut, and what does a cut cost?

`trace` makes a `Graph` of a module, `training` adds its backward pass, `problem` makes the planner's `Problem` of it.
"""
