"""Chat templates that compute for ever, fill the memory, or try to get out of the sandbox."""

TEXT = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}{{ ns.x | length }}"
LONG = "{% set s = 'a' * 7000000 %}"
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"

SLOW = {
    "nested loops": FOREVER.replace("BODY", "{% for k in range(99999) %}{% endfor %}"),
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop over filters": FOREVER.replace("range(99999) %}BODY", "range(99999) | map('string') | select %}"),
    "tests": "{{ range(99999) | select('in', range(99999) | map('string') | list) | list | length }}",
    "long comparisons": LONG
    + "{% set t = 'a' * 3000000 ~ 'b' %}{% for i in range(99999) %}{% if t in s %}{% endif %}{% endfor %}",
}
"""Stopped by the clock."""
LARGE = {
    "a product": "{{ 'a' * 10**10 }}",
    "a constant": "{{ 'a' | center(10000000000) }}",
    "a power": "{{ 10 ** 100000000 }}",
    "a growing number": TEXT.replace("'aaaaaaaa'", "3").replace("GROWN", "ns.x * ns.x"),
    "doubling": TEXT.replace("GROWN", "ns.x + ns.x"),
    "doubling with ~": TEXT.replace("GROWN", "ns.x ~ ns.x"),
    "nested lists": TEXT.replace("GROWN", "[ns.x, ns.x]").replace("| length", ""),
    "nested tuples": TEXT.replace("GROWN", "(ns.x, ns.x)").replace("| length", "| string"),
    "nested tables": TEXT.replace("GROWN", "{'a': ns.x, 'b': ns.x}").replace("| length", "| tojson"),
    "nested calls": TEXT.replace("GROWN", "dict(a=ns.x, b=ns.x)").replace("| length", "| tojson"),
    "growing lists": TEXT.replace("'aaaaaaaa'", "['a']").replace("GROWN", "ns.x + ns.x"),
    "replace": TEXT.replace("GROWN", "ns.x.replace('a', ns.x)"),
    "the filter replace": TEXT.replace("GROWN", "ns.x | replace('a', ns.x)"),
    "join": TEXT.replace("GROWN", "ns.x.join(ns.x)"),
    "the filter join": TEXT.replace("GROWN", "ns.x | join(ns.x)"),
    "text by text": LONG + "{{ [s, s, s] | join }}",
    "many variables": LONG + "".join(f"{{% set s{i} = s ~ 'b' %}}" for i in range(500)),
    "output": FOREVER.replace("BODY", "xxxxxxxxxxxxxxxxxxxxxxxxx"),
    "a block": LONG + "{% set b %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% of a name": "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "% of precision": "{{ 'in 2023: % .1000000000f' % 1.0 }}",
    "% *": "{{ '%*d' % (1000000000, 1) }}",
    "% after %%": "{{ '100%% 7 %1000000000d' % 1 }}",
    "% precision": "{{ '%.1000000000f' % 1 }}",
    "% of a key in brackets": "{{ '%((a)(b))01000000000d' % {'(a)(b)': 1} }}",
    "many widths of %": "{{ ('%(a)999d' * 900000) % {'a': 1} }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format in Arabic digits": "{{ '{:١٠٠٠٠٠٠٠٠٠}'.format(1) }}",
    "format after braces": "{{ '{{:1}} {x[a]!r:1000000000}'.format(x={'a': 1}) }}",
    "many widths of format": "{{ ('{0:999}' * 150000).format(1) }}",
    "format that breaks off later": "{{ '{:1000000000}{'.format(1) }}",
    "format by value": "{{ '{:{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(tabsize=10000000000) }}",
    "indent": "{{ 'a' | indent(10000000000, first=true) }}",
    "tojson": "{{ {'a': 1} | tojson(indent=10000000000) }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list }}",
    "round": "{{ 1.5 | round(1000000000, 'floor') }}",
    "map": "{{ range(99999) | map('center', 100000) | join }}",
    "rfind": LONG + "{{ s.rfind('b' ~ 'a' * 3000000) }}",
    "codecs": "{{ ('a' * 1000000).encode('punycode') }}",
    "characters": LONG + "{{ s | list | length }}",
    "slices": LONG + "{% for i in range(99999) %}{% if s[::-1] == 'x' %}{% endif %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long source": "{# " + "x" * 300_000 + " #}",
}
"""Stopped before what they ask for is made."""
REFUSED = {
    "an attribute": "{{ ''.__class__.__mro__ }}",
    "a change": "{% set _ = messages.append(1) %}",
    "a filter of pages": LONG + "{{ s | urlize }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
    "digits": "{{ " + "9" * 10_000 + " }}",
    "a message": "{{ raise_exception('\x1b[31m\u202e' * 100000) }}",
    "an import": "{% import 'os' as os %}",
}
"""Refused by the sandbox, or by Jinja."""
