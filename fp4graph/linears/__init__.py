"""Which linears a model has, and how to say so: tags, roles, stacks, selectors."""
