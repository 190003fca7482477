"""Shadow: is the candidate better than live?"""
