"""Auto-regression of sequences made of polynomials."""
