"""The machinery behind the three stages. A first reader can leave this folder closed."""
