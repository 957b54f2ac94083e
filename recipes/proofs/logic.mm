$( A small Metamath database: propositional logic with implication and negation, after Lukasiewicz. Symbols and
   labels are short, since a model of 150,000 parameters has to write them. $)

$c ( ) > ~ wff |- $.
$v p q r s t u v w x y $.
fp $f wff p $.
fq $f wff q $.
fr $f wff r $.
fs $f wff s $.
ft $f wff t $.
fu $f wff u $.
fv $f wff v $.
fw $f wff w $.
fx $f wff x $.
fy $f wff y $.

$( Negation and implication. $)
n $a wff ~ p $.
i $a wff ( p > q ) $.

$( The three axioms, and modus ponens. $)
a1 $a |- ( p > ( q > p ) ) $.
a2 $a |- ( ( p > ( q > r ) ) > ( ( p > q ) > ( p > r ) ) ) $.
a3 $a |- ( ( ~ p > ~ q ) > ( q > p ) ) $.
${
  mp.1 $e |- p $.
  mp.2 $e |- ( p > q ) $.
  mp $a |- q $.
$}

$( Everything implies itself. $)
id $p |- ( p > p ) $=
  fp fp fp i i
  fp fp i
  fp fp a1
  fp fp fp i fp i i
  fp fp fp i i fp fp i i
  fp fp fp i a1
  fp fp fp i fp a2
  mp mp $.
