"""HTTP. The only package that imports a web framework."""
