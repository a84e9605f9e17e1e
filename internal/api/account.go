package api

import (
	"net/http"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// ListSizes answers GET /v1/sizes.
func (s *server) ListSizes(w http.ResponseWriter, r *http.Request) {
	s.answer(w, r, http.StatusOK, SizeList{Sizes: each(s.Rows.Sizes(), sizeOf)})
}

// GetPool answers GET /v1/pool. The pool serves the templates of all organizations, so GetPool
// refuses admins of every organization but the operator's.
func (s *server) GetPool(w http.ResponseWriter, r *http.Request) {
	if callOf(r).Who.Org.Name != auth.OperatorOrg {
		s.fail(w, r, fault.New(fault.Denied, fault.CodeNotTheOperator,
			"only keys of the organization %q may read the pool", auth.OperatorOrg))
		return
	}
	pool := []PoolEntry{}
	if s.Sandboxes != nil {
		pool = each(s.Sandboxes.Pool(), func(p sandbox.PoolStatus) PoolEntry {
			return PoolEntry{
				Template: p.Template, TemplateVersion: p.Version, Size: p.Size,
				Ready: p.Ready, Claimed: p.Claimed, Target: p.Target,
			}
		})
	}
	pool, err := s.withPoolsOfOthers(r, pool)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, Pool{Pool: pool})
}

// GetMe answers GET /v1/me.
func (s *server) GetMe(w http.ResponseWriter, r *http.Request) {
	who := callOf(r).Who
	s.answer(w, r, http.StatusOK, Me{Org: orgOf(who.Org), APIKey: keyOf(who.Key)})
}

// CreateAPIKey answers POST /v1/api-keys.
func (s *server) CreateAPIKey(w http.ResponseWriter, r *http.Request) {
	var in CreateAPIKeyRequest
	if _, err := read(w, r, maxBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	expiresIn, err := duration("expires_in", in.ExpiresIn)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if expiresIn == nil {
		expiresIn = new(time.Duration) // 0 means that the key never expires
	}
	request := auth.KeyRequest{Name: in.Name, Scopes: in.Scopes, ExpiresIn: *expiresIn}
	if in.Format != nil {
		if *in.Format == "" {
			s.fail(w, r, fault.InvalidField("format", "must be %s or %s, not empty", auth.FormatCay, auth.FormatE2B))
			return
		}
		request.Format = auth.Format(*in.Format)
	}
	k, secret, err := s.Auth.CreateKey(r.Context(), callOf(r).Who, request)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusCreated, NewAPIKey{
		ID: k.ID, Name: k.Name, Prefix: k.Prefix, Scopes: scopesOf(k.Scopes),
		CreatedAt: k.CreatedAt.UTC(), ExpiresAt: at(k.ExpiresAt), APIKey: secret,
	})
}

// ListAPIKeys answers GET /v1/api-keys.
func (s *server) ListAPIKeys(w http.ResponseWriter, r *http.Request, params ListAPIKeysParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	keys, next, err := s.Auth.ListKeys(r.Context(), callOf(r).Who, limit, cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, APIKeyList{APIKeys: each(keys, keyOf), NextCursor: optional(next)})
}

// RevokeAPIKey answers DELETE /v1/api-keys/{key}.
func (s *server) RevokeAPIKey(w http.ResponseWriter, r *http.Request, id string) {
	if err := s.Auth.RevokeKey(r.Context(), callOf(r).Who, id); err != nil {
		s.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// CreateOrg answers POST /v1/orgs.
func (s *server) CreateOrg(w http.ResponseWriter, r *http.Request) {
	var in CreateOrgRequest
	if _, err := read(w, r, maxBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	o, k, secret, err := s.Auth.CreateOrg(r.Context(), callOf(r).Who, in.Name, quotaRequestOf(in.Quota))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusCreated, NewOrg{
		ID: o.ID, Name: o.Name, Quota: quotaOf(o.Quota), CreatedAt: o.CreatedAt.UTC(), APIKey: secret, APIKeyID: k.ID,
	})
}

func quotaRequestOf(in *QuotaRequest) auth.QuotaRequest {
	if in == nil {
		return auth.QuotaRequest{}
	}
	return auth.QuotaRequest{Sandboxes: in.Sandboxes, VCPUs: in.VCPUs, MemoryMB: in.MemoryMB}
}

// ListOrgs answers GET /v1/orgs.
func (s *server) ListOrgs(w http.ResponseWriter, r *http.Request, params ListOrgsParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	orgs, next, err := s.Auth.ListOrgs(r.Context(), callOf(r).Who, limit, cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, OrgList{Orgs: each(orgs, orgOf), NextCursor: optional(next)})
}

// GetHealth answers GET /healthz.
func (s *server) GetHealth(w http.ResponseWriter, r *http.Request) {
	s.answer(w, r, http.StatusOK, Health{Status: HealthStatusOk, Version: s.Version})
}

// GetReady answers GET /readyz.
func (s *server) GetReady(w http.ResponseWriter, r *http.Request) {
	if s.Ready != nil {
		if err := s.Ready(); err != nil {
			detail, after := "the server cannot create sandboxes now; its log says why", time.Duration(0)
			if f := fault.As(err); f != nil {
				detail, after = f.Detail, f.RetryAfter
			}
			s.fail(w, r, fault.New(fault.Unavailable, fault.CodeNotReady, "%s", detail).After(after).Because(err))
			return
		}
	}
	s.GetHealth(w, r)
}

// GetMetrics answers GET /metrics. The metrics cover all organizations, so GetMetrics refuses
// admins of every organization but the operator's.
func (s *server) GetMetrics(w http.ResponseWriter, r *http.Request) {
	if callOf(r).Who.Org.Name != auth.OperatorOrg {
		s.fail(w, r, fault.New(fault.Denied, fault.CodeNotTheOperator,
			"only keys of the organization %q may read the metrics", auth.OperatorOrg))
		return
	}
	s.Metrics.ServeHTTP(w, r)
}

// GetOpenAPI answers GET /openapi.yaml. It limits the requests of an address as it limits failed
// attempts to authenticate, because the document is large and needs no key.
func (s *server) GetOpenAPI(w http.ResponseWriter, r *http.Request) {
	if err := s.Auth.Failed(r.RemoteAddr); err != nil {
		s.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/yaml")
	if _, err := w.Write(cay.OpenAPI); err != nil {
		callOf(r).Err = err
	}
}
