package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
)

// model plays a language model behind OpenAI's API, for programs that are tested without one. It
// answers a prompt with a call of a tool, and the tool's result with that result.
type model struct {
	url   string
	calls map[string]string // arguments by the name of the tool that is called, as JSON

	mu sync.Mutex
	// +checklocks:mu
	results []string // of tools, in the order in which they came
}

// newModel starts a model that calls the first tool that calls names. It ends with the test.
func newModel(t *testing.T, calls map[string]string) *model {
	m := &model{calls: calls}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/responses", m.answerTo(m.respond))
	mux.HandleFunc("POST /v1/chat/completions", m.answerTo(m.complete))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	m.url = server.URL + "/v1"
	return m
}

// took returns the results that tools have given the model.
func (m *model) took() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.results)
}

// modelRequest has the fields of both APIs that the model reads.
type modelRequest struct {
	Stream bool `json:"stream"`
	Tools  []struct {
		Name     string `json:"name"`
		Function struct {
			Name string `json:"name"`
		} `json:"function"`
	} `json:"tools"`
	Input    json.RawMessage `json:"input"` // a text, or items
	Messages []struct {
		Role    string          `json:"role"`
		Content json.RawMessage `json:"content"`
	} `json:"messages"`
}

// tool returns the name of the tool that the model calls.
func (m *model) tool(r modelRequest) (string, error) {
	var offered []string
	for _, t := range r.Tools {
		name := t.Name + t.Function.Name // each API uses one of them
		if m.calls[name] != "" {
			return name, nil
		}
		offered = append(offered, name)
	}
	return "", fmt.Errorf("no tool that the model calls is among %q", offered)
}

// result notes what a tool gave, which is a text or a list of parts with texts.
func (m *model) result(raw json.RawMessage) (string, error) {
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		var parts []struct {
			Text string `json:"text"`
		}
		if err := json.Unmarshal(raw, &parts); err != nil {
			return "", fmt.Errorf("decoding a tool's result %s: %w", raw, err)
		}
		for _, part := range parts {
			text += part.Text
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.results = append(m.results, text)
	return text, nil
}

func (m *model) answerTo(answer func(modelRequest) (object, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var request modelRequest
		err := json.NewDecoder(r.Body).Decode(&request)
		if err == nil && request.Stream {
			err = fmt.Errorf("this model does not stream")
		}
		var body object
		if err == nil {
			body, err = answer(request)
		}
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			body = object{"error": object{"message": err.Error(), "type": "invalid_request_error"}}
		}
		_ = json.NewEncoder(w).Encode(body) // the program sees that it is not whole
	}
}

// respond answers a call of the Responses API.
func (m *model) respond(r modelRequest) (object, error) {
	var items []struct {
		Type   string          `json:"type"`
		Output json.RawMessage `json:"output"`
	}
	_ = json.Unmarshal(r.Input, &items) // a text is a prompt
	var output object
	if n := len(items); n > 0 && items[n-1].Type == "function_call_output" {
		text, err := m.result(items[n-1].Output)
		if err != nil {
			return nil, err
		}
		output = object{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
			"content": []object{{"type": "output_text", "text": text, "annotations": []object{}}}}
	} else {
		name, err := m.tool(r)
		if err != nil {
			return nil, err
		}
		output = object{"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": name,
			"arguments": m.calls[name], "status": "completed"}
	}
	return object{"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "none",
		"output": []object{output}, "parallel_tool_calls": false, "tools": []object{},
		"usage": object{"input_tokens": 1, "input_tokens_details": object{"cached_tokens": 0}, "output_tokens": 1,
			"output_tokens_details": object{"reasoning_tokens": 0}, "total_tokens": 2}}, nil
}

// complete answers a call of the Chat Completions API.
func (m *model) complete(r modelRequest) (object, error) {
	message, reason := object{"role": "assistant"}, "stop"
	if n := len(r.Messages); n > 0 && r.Messages[n-1].Role == "tool" {
		text, err := m.result(r.Messages[n-1].Content)
		if err != nil {
			return nil, err
		}
		message["content"] = text
	} else {
		name, err := m.tool(r)
		if err != nil {
			return nil, err
		}
		reason = "tool_calls"
		message["content"] = nil
		message["tool_calls"] = []object{{"id": "call_1", "type": "function",
			"function": object{"name": name, "arguments": m.calls[name]}}}
	}
	return object{"id": "chatcmpl_1", "object": "chat.completion", "created": 1, "model": "none",
		"choices": []object{{"index": 0, "message": message, "finish_reason": reason}},
		"usage":   object{"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}, nil
}
