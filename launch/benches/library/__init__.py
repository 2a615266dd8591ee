"""The library of instances: described problems, the best known value and bound of each, and who checks them."""
