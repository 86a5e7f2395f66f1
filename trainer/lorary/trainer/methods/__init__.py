"""Every method of training, each in a module of its own, behind one table.

``rules`` says what a method is and what it can be combined with, before anything is loaded; ``attach``
puts it onto a base. What a method has to answer while it trains is ``method.Attached``.
"""
