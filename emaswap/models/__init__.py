"""Small reference networks that every service trusts. Importing this package imports none of them."""
