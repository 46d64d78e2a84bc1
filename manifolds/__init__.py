"""Riemannian geometry of quotient manifolds on torch tensors."""
