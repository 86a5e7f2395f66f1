"""The console: a page for people at ``/console``, and the little JSON that it asks for.

``site`` is the page, in files as they are served; ``pages`` serves them; ``hosts`` keeps other web pages out
where nobody is asked for a token; ``view`` says what there is, ``figures`` what is measured, ``moves`` moves
aliases. What the page's playground asks is OpenAI's API, as any client's.
"""
