package sandbox

// Rule is the rule of an operation, for tests.
type Rule struct {
	Asked, Acts, Failed []State
	Claim, Done         State
}

// RuleOf returns the rule of an operation.
func RuleOf(kind string) Rule {
	r := rules[opKind(kind)]
	return Rule{r.asked, r.acts, r.failed, r.claim, r.done}
}

// Operations returns the names of all operations that have a rule.
func Operations() (names []string) {
	for kind := range rules {
		names = append(names, string(kind))
	}
	return names
}

// Moves returns the states that a state may lead to.
func Moves(from State) []State { return moves[from] }
