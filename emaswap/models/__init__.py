"""Small reference networks, which every service trusts. Importing this package imports none of them."""
