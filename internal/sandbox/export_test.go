package sandbox

import "time"

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

// Summary returns the text for the policy in the event of its change.
func Summary(e Egress) string { return e.summary() }

// Resolve checks a request and returns the sandbox that it asks for.
func Resolve(r Request, cfg Config, v TemplateVersion, now time.Time) (Sandbox, error) {
	if err := r.check(cfg); err != nil {
		return Sandbox{}, err
	}
	return r.resolve(cfg, "org_a", v, now)
}
