"""Problems, placements, solvers with proven bounds, and the plans that carry a placement out. No torch in here."""
